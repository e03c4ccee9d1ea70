"""A warm start of the first block that sees clips: at each name in a question, what is true of that thing; for small budgets.

python -m mm.train.video_ground [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("video-ground")
