"""Supervised finetuning: the language model swapped for its instruct version, answers supervised (section 7.5.2).

python -m mm.train.image_sft [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("image-sft")
