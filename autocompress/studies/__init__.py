"""The parts of `autocompress.study`: what is asked, what is found, how it begins and ends."""
