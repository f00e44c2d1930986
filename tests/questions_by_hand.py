"""Methods and questions that need no tokenizer, and the units that they make."""

import numpy as np

import jaxkv
from jaxkv.evaluation import plan as planning
from jaxkv.evaluation.experiment import whole
from jaxkv.evaluation.methods import Method
from jaxkv.evaluation.questions import Cell, Question
from jaxkv.tasks.samples import Sample

FULL = Method(name="full")
SMALL = Method(name="small", prefill=jaxkv.StreamingLLM())
ROLLING = Method(
    name="rolling", prefill=jaxkv.StreamingLLM(), decode=jaxkv.StreamingLLM()
)


def question(index, *, length=100, task="vt", prompt=90, new=10, answer=5, depth=None):
    cell = Cell(task=task, length=length, depth=depth)
    sample = Sample(
        task=task,
        segments=(("ask", False), (" red blue", True)),
        outputs=("red", "blue"),
        max_new_tokens=new,
    )
    ids = np.arange(prompt, dtype=np.int32) + index
    return Question(
        cell=cell,
        index=index,
        ids=ids,
        sample=sample,
        answer_tokens=answer,
        by_lines=False,
    )


def plan(questions, methods, budgets, *, limit=None, by_cell=False, **options):
    defaults = dict(
        whole=whole("ruler", questions),
        outputs=planning.longest_outputs(questions, by_cell=by_cell, limit=limit),
        batch_size=4,
        mixed=False,
        done=set(),
    )
    return planning.plan(questions, methods, budgets, **defaults | options)
