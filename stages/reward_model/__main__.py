"""accelerate launch -m stages.reward_model recipes/<name>.yaml [--section NAME] [key=value ...]"""

from training.run import main

if __name__ == "__main__":
    main("reward_model")
