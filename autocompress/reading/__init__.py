"""Reading labelled images: from arrays and files, divided into train, val and test, preprocessed and checked."""
