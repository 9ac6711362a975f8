"""python -m flowbp.shapes.recipe STAGE --out DIR"""

from .stages import main

if __name__ == "__main__":
    main()
