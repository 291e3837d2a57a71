"""Analysis of detections: what a detector gets wrong, and whether its scores tell how well its boxes fit.

Plain arrays in, numbers out: ``matching`` and ``average_precision`` follow COCO's rules image by image, ``bootstrap``
resamples images, ``best_regressed`` and ``misalignment`` are the measurements of Align-DETR (arXiv 2304.07527),
``error_types`` those of TIDE (arXiv 2008.08115), ``oracle`` says what misalignment costs. ``figures`` and ``looking``
draw.
"""
