"""Mathematical answers: what is written around one is dropped (`writing`), what it is is read (`forms`), and two are
compared part by part (`same`). Numbers are compared exactly (`values`), quantities in their units (`units`), and
everything else as math-verify reads and compares it. No side is ever cut down to a part that happens to agree: what
cannot be read whole equals only what is written alike."""
