"""Annealing: image-adapter again, with larger tiles and a new optimiser (section 7.4).

python -m mm.train.image_anneal [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("image-anneal")
