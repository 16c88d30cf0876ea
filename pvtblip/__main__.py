"`python -m pvtblip`, for machines and launchers that want a module."
from pvtblip.cli import main

main()
