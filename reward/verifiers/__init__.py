"""Verifiers: rewards that check an answer against known facts. Each is a plain function, listed in reward.functions.

maths.py        equal numbers and expressions (math-verify in a separate process: maths_process.py, maths_worker.py)
text.py         multiple choice, regular expressions, tags
json_schema.py  JSON that follows a schema
ifeval.py       the 25 instruction types of IFEval (ifeval_checks.py), counted on text (ifeval_text.py), also as the
                RLVR mixture writes them (ifeval_rlvr.py)
golds.py        finds a row's gold answer, and makes errors that name the row

The score is 1 for right and 0 for wrong (`ifeval` can give fractions), and None for rows without a gold answer of this
kind. So data of several kinds can be mixed, and each row is scored by the functions that apply to it. No completion
raises an error, whatever its text; a gold answer that cannot be read always does.
"""
