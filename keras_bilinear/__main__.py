from keras_bilinear.cli.main import main

if __name__ == "__main__":
    main()
