from keras_bilinear.cli import main

if __name__ == "__main__":
    main()
