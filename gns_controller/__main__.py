"""python -m gns_controller."""

from gns_controller.cli import main

if __name__ == "__main__":
    main()
