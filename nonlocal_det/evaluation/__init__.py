"""COCO's measures: quickly, with each class's in a table, and their curves."""

from .coco_evaluation import ReportingCOCOEvaluator

__all__ = ["ReportingCOCOEvaluator"]
