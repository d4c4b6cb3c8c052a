"""KerasHub's image classifiers at tiny configurations: the architectures of its presets with few, narrow stages.

`hub` is the module `keras_hub.models`, which is imported only where one of them is built.
"""

SIZE = 32


def resnet(hub, **options):
    return hub.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 16],
        stackwise_num_blocks=[2, 2],
        stackwise_num_strides=[1, 2],
        image_shape=(SIZE, SIZE, 3),
        **options,
    )


def efficientnet(hub, **options):
    stages = {
        "stackwise_kernel_sizes": [3, 3, 5],
        "stackwise_num_repeats": [1, 2, 2],
        "stackwise_input_filters": [8, 8, 16],
        "stackwise_output_filters": [8, 16, 24],
        "stackwise_expansion_ratios": [1, 4, 4],
        "stackwise_squeeze_and_excite_ratios": [0.25, 0.25, 0.25],
        "stackwise_strides": [1, 2, 2],
        "stackwise_block_types": ["v1", "v1", "v1"],
        "stackwise_width_coefficients": [1.0] * 3,
        "stackwise_depth_coefficients": [1.0] * 3,
        "stackwise_force_input_filters": [0] * 3,
        "stackwise_nores_option": [False] * 3,
    }
    return hub.EfficientNetBackbone(**{**stages, **options}, input_shape=(SIZE, SIZE, 3))


def mobilenet(hub):
    return hub.MobileNetBackbone(
        stackwise_expansion=[[16, 24], [32, 40]],
        stackwise_num_blocks=[2, 2],
        stackwise_num_filters=[[8, 8], [12, 12]],
        stackwise_kernel_size=[[3, 3], [5, 5]],
        stackwise_num_strides=[[2, 1], [2, 1]],
        stackwise_se_ratio=[[None, None], [0.25, 0.25]],
        stackwise_activation=[["relu", "relu"], ["hard_swish", "hard_swish"]],
        stackwise_padding=[[1, 1], [2, 2]],
        output_num_filters=32,
        input_num_filters=8,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        squeeze_and_excite=0.5,
        last_layer_filter=32,
        image_shape=(SIZE, SIZE, 3),
    )


def densenet(hub):
    return hub.DenseNetBackbone(stackwise_num_repeats=[2, 3], growth_rate=8, image_shape=(SIZE, SIZE, 3))


def cspnet(hub, **options):
    return hub.CSPNetBackbone(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 2],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[16, 24],
        bottle_ratio=[0.5],
        expand_ratio=[2.0],
        image_shape=(SIZE, SIZE, 3),
        **options,
    )


def vgg(hub):
    return hub.VGGBackbone(stackwise_num_repeats=[1, 2], stackwise_num_filters=[8, 16], image_shape=(SIZE, SIZE, 3))


def xception(hub):
    return hub.XceptionBackbone(
        stackwise_conv_filters=[[8, 12], [16, 16], [20, 24]],
        stackwise_pooling=[True, True, False],
        image_shape=(SIZE, SIZE, 3),
    )


def mit(hub):
    return hub.MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        hidden_dims=[8, 16],
        image_shape=(SIZE, SIZE, 3),
    )


def vit(hub):
    return hub.ViTBackbone(
        image_shape=(SIZE, SIZE, 3), patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16
    )


def deit(hub):
    return hub.DeiTBackbone(
        image_shape=(SIZE, SIZE, 3), patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16
    )


BACKBONES = {
    "ResNet": lambda hub: resnet(hub, block_type="bottleneck_block"),
    "ResNetV2": lambda hub: resnet(hub, block_type="basic_block", use_pre_activation=True),
    "EfficientNet": efficientnet,
    "EfficientNetV2": lambda hub: efficientnet(hub, stackwise_block_types=["fused", "fused", "unfused"]),
    "MobileNet": mobilenet,
    "DenseNet": densenet,
    "CSPDarkNet": lambda hub: cspnet(hub, block_type="dark_block", stage_type="csp"),
    "CSPResNeXt": lambda hub: cspnet(hub, block_type="bottleneck_block", stage_type="csp", groups=2),
    "VGG": vgg,
    "Xception": xception,
    "MiT": mit,
    "ViT": vit,
    "DeiT": deit,
}


def build(name):
    """A classifier of 5 classes around a backbone."""
    import keras_hub.models as hub

    classifier = {"ViT": hub.ViTImageClassifier, "DeiT": hub.DeiTImageClassifier}.get(name, hub.ImageClassifier)
    return classifier(backbone=BACKBONES[name](hub), num_classes=5, name=name.lower())
