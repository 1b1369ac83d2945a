"""Requests cut in two: the pages of prompts on their way from one engine to another."""

from fourfold.engine.handover.handover import Arrived, Delivered, Handover, Left, Lost
from fourfold.engine.handover.pages import page_format

__all__ = ["Arrived", "Delivered", "Handover", "Left", "Lost", "page_format"]
