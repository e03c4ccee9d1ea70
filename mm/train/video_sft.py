"""Finetuning of the temporal aggregator and the video blocks on instructions (section 7.5.2).

python -m mm.train.video_sft [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("video-sft")
