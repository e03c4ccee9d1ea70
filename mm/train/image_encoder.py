"""Contrastive pre-training of the image encoder (section 7.4's ViT, before the adapters).

python -m mm.train.image_encoder [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("image-encoder")
