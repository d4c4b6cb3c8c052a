"""`keras-morph zoo`: the architectures that can be named."""

__all__ = ["zoo"]


def zoo() -> None:
    """List the architectures that MODEL and --base-model-name can name."""
    from keras_morph.zoo import NAMES, known_names, minimum_size

    print("The Model Zoo:")
    for name in NAMES:
        print(f"  {name:<20} images of at least {minimum_size(name)} x {minimum_size(name)}")
    print("Also:")
    print("  " + ", ".join(name for name in known_names() if name not in NAMES))
