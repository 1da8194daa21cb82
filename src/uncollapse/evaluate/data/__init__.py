"""Images to fit on and to test on, in the layouts people have them."""
