"""Speech encoder and adapter under the frozen language model (section 8.3.1).

python -m mm.train.speech [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("speech")
