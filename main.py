"""The Model Zoo's command: `python main.py --base-model-name ResNet50` is `keras-morph train ...`."""

import sys

from keras_morph.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
