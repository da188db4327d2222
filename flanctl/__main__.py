"""`python -m flanctl`."""

from flanctl.entry import main

main()
