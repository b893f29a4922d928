"""All that reaches below the public interface of Keras, for Keras 3.13 to 3.15.

Each module says in its docstring which private parts of Keras it uses. The tests run with Keras
3.13 and 3.15.
"""
