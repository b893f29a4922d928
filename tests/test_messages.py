from keras_bilinear.messages import reason, require


def test_require_accepts_what_is_installed():
    require("json", "numpy")


def test_the_reason_is_a_line_without_colours_and_without_the_heading_of_keras():
    text = "Exception encountered when calling Dense.call().\n\n\x1b[1mno such shape\x1b[0m\n\nmore"
    assert reason(ValueError(text)) == "no such shape"
    assert reason(ValueError()) == "ValueError"


def test_the_reason_is_the_innermost_error_of_a_model_that_is_not_loaded():
    heading = "<class 'A'> could not be deserialized.\n\nconfig={}.\n\nException encountered: "
    assert reason(TypeError(f"{heading}{heading}no 'C'")) == "no 'C'"
