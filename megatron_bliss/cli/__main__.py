"""`python -m megatron_bliss.cli`: as launchers call a stage."""

from megatron_bliss.cli import main

if __name__ == "__main__":
    main()
