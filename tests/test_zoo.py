"""The zoo builds what its names say, with names of layers that depend on nothing else."""

import keras
import numpy as np
import pytest

from keras_morph import zoo
from keras_morph.errors import KerasMorphError

pytestmark = pytest.mark.usefixtures("quick_initializers")


def layer_names(model):
    return [layer.name for layer in model.layers]


def paths(model):
    return [weight.path for weight in model.weights]


@pytest.fixture(scope="module")
def resnet50(quick_initializers):
    return zoo.build("ResNet50")


@pytest.fixture(scope="module")
def mobilenet():
    return zoo.build("MobileNetV2", classes=7, classifier_activation=None, head=None)


@pytest.mark.once
def test_the_names_are_those_of_the_model_zoo():
    assert len(set(zoo.NAMES)) == len(zoo.NAMES) == 18
    assert zoo.NAMES[:5] == ("ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2")
    assert zoo.NAMES[-1] == "NASNetMobile"
    for name in zoo.known_names():
        assert hasattr(keras.applications, name) or name in ("ResNet20", "ResNet56", "DigitsResNet")
    assert {*zoo.NAMES, "ResNet20", "EfficientNetV2S", "ConvNeXtTiny"} < set(zoo.known_names())


@pytest.mark.once
def test_minimum_sizes():
    sizes = {name: zoo.minimum_size(name) for name in zoo.NAMES}
    assert {name: size for name, size in sizes.items() if size != 32} == {
        "Xception": 71,
        "InceptionV3": 75,
        "InceptionResNetV2": 75,
    }
    assert zoo.minimum_size("DigitsResNet") == 4


def test_the_head_of_the_model_zoo(resnet50):
    assert resnet50.name == "ResNet50"
    assert layer_names(resnet50)[-3:] == ["global_average_pooling", "head", "logits"]
    assert resnet50.get_layer("head").get_config()["activation"] == "relu"
    # ResNet50 without its top has 23,587,712 parameters; the head 2048 x 1024 + 1024 and 1024 x 10 + 10.
    np.testing.assert_equal(resnet50.count_params(), 23_587_712 + 2_098_176 + 10_250)
    outputs = resnet50.predict(np.random.default_rng(0).random((2, 32, 32, 3)), verbose=0)
    np.testing.assert_allclose(outputs.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.once
def test_options_of_the_head(mobilenet):
    assert layer_names(mobilenet)[-2:] == ["global_average_pooling", "logits"]
    assert mobilenet.output_shape == (None, 7)
    assert mobilenet.get_layer("logits").get_config()["activation"] == "linear"


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "anonymous"),
    [
        pytest.param("DenseNet121", ["input_layer", "zero_padding2d"], marks=pytest.mark.slow),
        ("MobileNetV3Small", ["input_layer", "re_lu"]),
    ],
)
def test_names_do_not_depend_on_what_was_built_before(name, anonymous):
    keras.layers.ZeroPadding2D(), keras.layers.ReLU()
    first = zoo.build(name)
    keras.layers.ZeroPadding2D(), keras.layers.ReLU()
    second = zoo.build(name)
    assert set(anonymous) <= set(layer_names(first))
    assert layer_names(first) == layer_names(second)
    assert paths(first) == paths(second)


@pytest.mark.once
def test_a_layer_that_is_added_to_a_model_has_a_free_name():
    model = zoo.build("MobileNetV3Small", head=None)
    added = keras.layers.ReLU()
    assert added.name not in layer_names(model)
    assert "re_lu" in layer_names(model)


@pytest.mark.once
def test_counting_goes_on_after_a_build():
    names = [keras.layers.ZeroPadding2D().name for _ in range(3)]
    zoo.digits_resnet()
    zoo.build("DigitsResNet")
    assert keras.layers.ZeroPadding2D().name not in names


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet50", {}, ["'resnet50'", "did you mean ResNet50"]),
        ("MobilNetV2", {}, ["MobileNetV2"]),
        ("zzz", {}, ["choose one of", "ResNet50", "DigitsResNet", "EfficientNetB0"]),
        ("InceptionV3", {}, ["75x75", "(32, 32, 3)", "image_size=75"]),
        ("Xception", {"input_shape": (71, 70, 3)}, ["71x71", "(71, 70, 3)"]),
        ("ResNet50", {"input_shape": (8, 8, 1)}, ["32x32", "DigitsResNet"]),
        ("DigitsResNet", {"input_shape": (3, 3, 1)}, ["4x4"]),
        ("ResNet50", {"input_shape": (32, 32)}, ["(height, width, channels)", "(32, 32)"]),
        ("ResNet50", {"classes": 0}, ["classes", "0"]),
        ("ResNet50", {"head": 0}, ["head", "0"]),
    ],
)
def test_complaints(name, options, words):
    with pytest.raises(KerasMorphError) as caught:
        zoo.build(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.once
def test_images_in_the_unit_interval_reach_efficientnet_at_full_scale():
    model = zoo.build("EfficientNetB0")
    assert layer_names(model)[1:3] == ["to_0_255", "rescaling"]
    to_stem = keras.Model(model.input, model.get_layer("normalization").output)
    x = np.random.default_rng(0).random((1, 32, 32, 3), np.float32)
    np.testing.assert_allclose(to_stem.predict(x, verbose=0), x, rtol=1e-5)


def test_small_networks_by_hand():
    """ResNet20 has 3 blocks a stage: 7 layers each (two convolutions), and two projections.

    Parameters of a convolution with BatchNormalization: size^2 x in x out + 4 x out.
    """
    stem = 9 * 3 * 16 + 64
    stage1 = 6 * (9 * 16 * 16 + 64)
    stage2 = (9 * 16 * 32 + 128) + 5 * (9 * 32 * 32 + 128) + (16 * 32 + 128)
    stage3 = (9 * 32 * 64 + 256) + 5 * (9 * 64 * 64 + 256) + (32 * 64 + 256)
    model = zoo.build("ResNet20")
    np.testing.assert_equal(model.count_params(), stem + stage1 + stage2 + stage3 + 64 * 10 + 10)
    assert len(model.layers) == 1 + 3 + 9 * 7 + 2 * 2 + 2
    assert (model.name, model.output_shape) == ("ResNet20", (None, 10))
    names = layer_names(model)
    assert {"stem_conv", "stage2_block1_conv1", "stage2_block1_bn1", "stage3_block1_shortcut_conv"} < set(names)
    assert "stage1_block1_shortcut_conv" not in names
    assert model.get_layer("stage3_block3_relu2").output.shape == (None, 8, 8, 64)


@pytest.mark.once
def test_resnet56_has_nine_blocks_a_stage():
    model = zoo.resnet56()
    assert model.name == "ResNet56"
    assert len(model.layers) == 1 + 3 + 27 * 7 + 2 * 2 + 2
    assert len([layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]) == 55 + 2


def test_digits_resnet():
    model = zoo.digits_resnet()
    assert model.name == "DigitsResNet"
    assert (model.input_shape, model.output_shape) == ((None, 8, 8, 1), (None, 10))
    assert layer_names(model) == layer_names(zoo.build("DigitsResNet", input_shape=(8, 8, 1)))
    assert not model.losses


@pytest.mark.once
def test_resnet_cifar_scales_its_width():
    model = zoo.resnet_cifar(8, input_shape=(8, 8, 1), classes=3, width=4, classifier_activation=None)
    assert model.name == "ResNet8"
    assert [model.get_layer(f"stage{stage}_block1_conv2").filters for stage in (1, 2, 3)] == [4, 8, 16]
    with pytest.raises(KerasMorphError, match="received 21; take 20"):
        zoo.resnet_cifar(21)
