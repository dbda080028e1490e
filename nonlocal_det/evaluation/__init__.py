"""COCO evaluation: fast, with results per class and precision-recall curves."""

from .coco_evaluation import ReportingCOCOEvaluator

__all__ = ["ReportingCOCOEvaluator"]
