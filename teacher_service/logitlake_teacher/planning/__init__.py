"""Planning: data sources -> deterministic units of work on disk.

intake      records -> drafts: read, rendered, checked
token_intake  the same of token ids, column by column
rows        drafts as Arrow rows, and back to items
spool       rows in order, whatever their number
pictures    what must be known of the images
units_file  rows cut into units
build       all of it together
plan        a plan on disk, used again while its inputs are the same
figures     what is counted on the way
"""

from logitlake_teacher.planning.build import OnProgress
from logitlake_teacher.planning.figures import PlanFigures
from logitlake_teacher.planning.plan import Plan, Remaining, check_plan, make_plan

__all__ = ["OnProgress", "Plan", "PlanFigures", "Remaining", "check_plan", "make_plan"]
