"""All that reaches below the public interface of Keras; tested on Keras 3.13 and 3.15."""
