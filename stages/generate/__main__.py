"""accelerate launch -m stages.generate recipes/<name>.yaml [--section NAME] [key=value ...]"""

from training.run import main

if __name__ == "__main__":
    main("generate")
