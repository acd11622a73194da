"""accelerate launch -m stages.sft recipes/<name>.yaml [--section NAME] [key=value ...]"""

from training.run import main

if __name__ == "__main__":
    main("sft")
