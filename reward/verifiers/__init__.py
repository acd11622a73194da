"""Verifiers: rewards that compare an answer with what is known, each a plain function of the table in reward.functions.

maths.py        equal numbers and expressions (math-verify, in a process of its own: maths_process.py, maths_worker.py)
text.py         multiple choice, regular expressions, tags
json_schema.py  JSON that follows a schema
ifeval.py       the 25 instruction types of IFEval (ifeval_checks.py), counted on text (ifeval_text.py), also as the
                RLVR mixture writes them (ifeval_rlvr.py)
golds.py        where the right answer of a row is found, and errors that name the row

A value is 1 for right and 0 for wrong (`ifeval` can give the fraction between). None, no opinion, is for rows that
have no right answer of this kind: data of several kinds can be mixed, each row scored by the functions that know it. A
completion never raises, whatever its text; a right answer that cannot be read always does.
"""
