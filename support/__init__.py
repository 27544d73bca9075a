"""What the scripts share and what is not the paper. Each file has one subject:

    runs.py           flags, errors of one line, processes, the folder of a run and its checkpoint
    results.py        experiments with several seeds: their files of results, means, tables
    images.py         images on disk: data sets, decoding, unreadable files
    evaluation.py     classifiers on frozen features
    figures.py        what all figures have in common
    drawings.py       images that we draw: digits, gratings, and a small encoder for them
    glyphs.py         images of one or two of hundreds of glyphs
    heads.py          many heads on one encoder: a search for the lowest loss of PMSN
    photographs.py    small photographs, and a small ResNet for them
"""
