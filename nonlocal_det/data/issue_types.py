"""Everything that can be wrong with a dataset in COCO format.

Severities: an *error* makes the file ambiguous or leaves nothing usable, and prevents a run. A
*removed* entry is unusable and left out of training and evaluation. A *fixed* value is one that
COCO evaluation needs and that could be derived. An *info* changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

ERROR, REMOVED, FIXED, INFO = "error", "removed", "fixed", "info"
SEVERITIES = (ERROR, REMOVED, FIXED, INFO)


class IssueType(NamedTuple):
    """A type of issue.

    Attributes:
        severity: One of `SEVERITIES`.
        message: What is wrong, with which entries.
        hint: How to fix it, or what is done about it.
    """

    severity: str
    message: str
    hint: str


ISSUE_TYPES = {
    # The file.
    "unreadable": IssueType(
        ERROR, "the file cannot be read as JSON", "pass a COCO annotation file"
    ),
    "not_a_dataset": IssueType(
        ERROR,
        "the file is not a COCO dataset",
        "expected an object with the lists images, annotations and categories",
    ),
    "no_folder": IssueType(ERROR, "the image directory does not exist", "pass the right directory"),
    "no_images": IssueType(ERROR, "no image is usable", "fix the removed entries"),
    "no_annotations": IssueType(ERROR, "no annotation is usable", "fix the removed entries"),
    "no_objects": IssueType(
        ERROR, "all annotations are crowds", "annotate single objects, with iscrowd 0"
    ),
    "no_visible_keypoints": IssueType(
        ERROR,
        "the model predicts keypoints, but none is annotated as visible",
        "the third number of each is 0 for not labeled, 1 for hidden or 2 for visible",
    ),
    "no_categories": IssueType(ERROR, "there are no categories", "list the classes in categories"),
    # Categories.
    "bad_category": IssueType(
        ERROR, "categories without an integer id or a name", "give each an id and a name"
    ),
    "same_category_id": IssueType(ERROR, "duplicate category ids", "give each category its own id"),
    "undeclared_category": IssueType(
        ERROR, "annotations of a category that is not declared", "add it to categories"
    ),
    "no_keypoint_names": IssueType(
        ERROR,
        "the model predicts keypoints, but no category names any",
        "list their names in the category's keypoints, or use a config without keypoints",
    ),
    "keypoints_differ": IssueType(
        ERROR, "categories with different keypoints", "a model has one list of keypoints"
    ),
    "other_categories": IssueType(
        ERROR,
        "the categories are not those of training",
        "give all files the same categories",
    ),
    "num_classes": IssueType(
        ERROR,
        "the config's number of classes is not the dataset's",
        "set it to the number of categories",
    ),
    "other_order": IssueType(
        FIXED, "the categories are numbered in another order than in training", "renumbered"
    ),
    "only_boxes": IssueType(
        INFO,
        "the training set has masks, the validation set none",
        "only boxes are evaluated",
    ),
    "same_name": IssueType(INFO, "duplicate category names", "kept as separate classes"),
    "unused_category": IssueType(INFO, "categories without an annotation", "kept as classes"),
    # Images.
    "bad_image": IssueType(
        REMOVED,
        "images without a valid id, file_name, width or height",
        "all but file_name are integers",
    ),
    "same_image_id": IssueType(ERROR, "duplicate image ids", "give each image its own id"),
    "missing_image": IssueType(
        REMOVED,
        "images whose file does not exist",
        "names count letter by letter, in case and Unicode form; removed with their annotations",
    ),
    "unreadable_image": IssueType(
        REMOVED, "images whose file cannot be read", "removed with their annotations"
    ),
    "other_size": IssueType(
        REMOVED,
        "images whose size is not the JSON's",
        "the size is that after EXIF rotation; removed with their annotations",
    ),
    "same_file": IssueType(INFO, "images with a duplicate file_name", "both kept"),
    "without_annotations": IssueType(
        INFO, "images without annotations", "evaluated, but skipped in training"
    ),
    "shared_image": IssueType(
        INFO, "validation images that are also in the training set", "the metrics are too high"
    ),
    # Annotations.
    "bad_annotation": IssueType(
        REMOVED, "annotations without a valid id, image_id or category_id", "all are integers"
    ),
    "same_annotation_id": IssueType(
        ERROR, "duplicate annotation ids", "give each annotation its own id"
    ),
    "no_such_image": IssueType(
        REMOVED, "annotations of images that are not listed", "add the images"
    ),
    "ignored": IssueType(REMOVED, "annotations with ignore set", "COCO's key for it is iscrowd"),
    "bad_box": IssueType(
        REMOVED, "boxes that are not 4 finite numbers", "boxes are x, y, width, height"
    ),
    "empty_box": IssueType(
        REMOVED,
        "boxes without positive width and height",
        "boxes are x, y, width, height, not two corners",
    ),
    "relative_boxes": IssueType(
        ERROR, "all boxes are within 0 to 1", "boxes are in pixels, not relative to the image"
    ),
    "outside": IssueType(REMOVED, "boxes entirely outside their image", "boxes are in pixels"),
    "beyond": IssueType(
        INFO, "boxes that extend more than a pixel beyond their image", "clipped in training"
    ),
    "bad_polygon": IssueType(
        REMOVED,
        "polygons with fewer than 3 points, an odd number of coordinates, invalid or huge numbers",
        "the annotation is removed if it has no other polygon",
    ),
    "bad_rle": IssueType(
        REMOVED,
        "masks whose RLE is not valid or does not have the image's size",
        "size is [height, width], and the counts add up to its area",
    ),
    "unused_mask": IssueType(
        FIXED, "invalid masks, which the model does not need", "removed from their annotations"
    ),
    "no_mask": IssueType(
        REMOVED, "annotations without segmentation (others have one)", "required to train masks"
    ),
    "bad_keypoints": IssueType(
        REMOVED,
        "keypoints that are not x, y, visibility for each name",
        "removed with the annotation",
    ),
    "bad_crowd": IssueType(
        REMOVED, "annotations whose iscrowd is not 0 or 1", "it is a number, not a text"
    ),
    "no_keypoints": IssueType(FIXED, "annotations without keypoints", "set to not visible"),
    "num_keypoints": IssueType(FIXED, "num_keypoints missing or wrong", "counted again"),
    "no_area": IssueType(FIXED, "annotations without area", "set to the box's area"),
    "no_crowd": IssueType(FIXED, "annotations without iscrowd", "set to 0"),
}
