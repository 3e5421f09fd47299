from dentalgemma.cli import main

main()
