"""Learned baselines, trained on the same photographs as the units: an image codec, and Entropic Student.

recipe --train_codec, train_student--> weights in the folder of runs --measure--> BaselinePoint
"""
