"""The end-to-end phase of stages 2 and 3: the whole model against the teacher's predictions."""
