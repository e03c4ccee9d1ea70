"""Pre-training of the image adapter and encoder on a frozen language model (section 7.4).

python -m mm.train.image_adapter [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("image-adapter")
