"""``python -m stablemoe_ds`` is the ``stablemoe`` command; launchers start it so."""

from stablemoe_ds.cli import main

if __name__ == "__main__":
    main()
