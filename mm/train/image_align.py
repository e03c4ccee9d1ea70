"""A warm start of the image encoder on captions and answers, letter by letter, without the language model, for small budgets.

python -m mm.train.image_align [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("image-align")
