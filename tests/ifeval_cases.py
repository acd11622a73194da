"""Answers that follow each of IFEval's 25 instruction types, and answers that only seem to follow it."""

HINDI = "यह एक हिंदी वाक्य है जो बहुत अच्छा है और हम इसे पढ़ सकते हैं।"
MARATHI = "ही एक मराठी वाक्य आहे आणि ते खूप चांगले आहे, आपण ते वाचू शकतो."
ENGLISH = (
    "The quick brown fox jumps over the lazy dog while the farmer sleeps under an old oak tree near the river bank."
)

# instruction: (kwargs, answers that follow, answers that do not)
CASES = {
    "keywords:existence": [
        (
            {"keywords": ["intern", "grow"]},
            ["The intern will GROW.", "grow, grow; *Intern*!", "_intern_ (grow)"],
            ["The intern is here.", "International growth", "grown interns", "in tern grow"],
        ),
        ({"keywords": ["New York"]}, ["in new\nyork today"], ["New Yorkers", "york new"]),
        ({"keywords": ["C++"]}, ["I like C++."], ["I like C."]),
    ],
    "keywords:frequency": [
        (
            {"keyword": "war", "relation": "at least", "frequency": 2},
            ["War and war", "war-time war", "war war war"],
            ["war", "warfare warship", "software war"],
        ),
        ({"keyword": "rock", "relation": "less than", "frequency": 1}, ["stone", "rocky"], ["a Rock!"]),
    ],
    "keywords:forbidden_words": [
        (
            {"forbidden_words": ["can", "ride"]},
            ["Candid pride.", "I could", "a toucan"],
            ["I can.", "Ride!", "(can)", "a can-opener"],
        ),
    ],
    "keywords:letter_frequency": [
        ({"letter": "q", "let_relation": "at least", "let_frequency": 2}, ["Quick quip", "qQ"], ["quick", "kk"]),
        ({"letter": "#", "let_relation": "at least", "let_frequency": 4}, ["#a #b\n## c"], ["# # #"]),
        ({"letter": "e", "let_relation": "less than", "let_frequency": 1}, ["a dry gypsy"], ["Every", "the"]),
    ],
    "language:response_language": [
        ({"language": "hi"}, [HINDI], [MARATHI, ENGLISH, "ok", f"{HINDI * 3}\n\n{ENGLISH}"]),
        ({"language": "mr"}, [MARATHI], [HINDI]),
        ({"language": "de"}, ["Das ist ein kurzer deutscher Satz, und er hat keinen besonderen Inhalt."], [ENGLISH]),
        ({"language": "en"}, [ENGLISH, "Yes."], [HINDI, "Ceci est une phrase en français, sans aucun intérêt."]),
    ],
    "length_constraints:number_sentences": [
        (
            {"relation": "at least", "num_sentences": 3},
            ["One. Two! Three?", "Is it? It is... No", "- buy milk\n- buy eggs\n- go home", "no. no. no."],
            ["One. Two.", "Dr. J. Smith paid 3.50 to Mrs. Jones. Fine.", "... !!! ???", "1. 2. 3."],
        ),
        (
            {"relation": "less than", "num_sentences": 3},
            [
                "Mr. A. Bc came at 5 p.m. yesterday. He left.",
                "I like cats, e.g. Tom.",
                "Well... maybe. Yes.",
                "你好。再见。",
            ],
            ["A man came. He saw. He left.", "One!\n\nTwo!\n\nThree!", "你好。再见。谢谢。"],
        ),
    ],
    "length_constraints:number_paragraphs": [
        (
            {"num_paragraphs": 2},
            ["One.\n***\nTwo.", "One\n\n***\n\nTwo\n", "One *** two", "One\n* * *\nTwo", "***\nOne\n***\nTwo\n***"],
            ["One\n\nTwo", "One\n***\nTwo\n***\nThree", "One\n***\n***\nTwo", "One ***bold*** two", "One\n****\nTwo"],
        ),
    ],
    "length_constraints:number_words": [
        (
            {"relation": "at least", "num_words": 4},
            ["I don't know it", "a b c d"],
            ["a b c", "- - - - a", "well-known don't x"],
        ),
        ({"relation": "less than", "num_words": 3}, ["a b", "a * b !"], ["a b c", "a\nb\tc"]),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            {"first_word": "weekend", "num_paragraphs": 2, "nth_paragraph": 2},
            ["One.\n\nWeekend it is.", "One\n \n**Weekend** plans\n", 'One\nmore\n\n"Weekend," she said'],
            [
                "Weekend.\n\nTwo.",
                "One.\n\nWeekends are fine.",
                "One.\nWeekend it is.",
                "One.\n\nWeekend.\n\nThree.",
                "One.\n\nThe weekend",
                "Weekend",
            ],
        ),
        ({"first_word": "it", "num_paragraphs": 1, "nth_paragraph": 1}, ["It is."], ["It's", "Is it"]),
    ],
    "detectable_content:postscript": [
        (
            {"postscript_marker": "P.S."},
            [
                "Bye.\nP.S. I love you",
                "Bye\n\n**P.S.** More",
                "bye\np.s. more",
                "Bye\nP.S.\nMore here",
                "Bye\nP. S. More",
            ],
            ["Bye. P.S. I love you", "Bye", "Bye\nP.S.", "Bye\nPS. more", "Bye\nP.P.S. more", "Psychology is fun"],
        ),
        (
            {"postscript_marker": "P.P.S"},
            ["Bye\nP.P.S more", "Bye\nP.S. one\nP.P.S. two", "bye\np.p.s: two"],
            ["Bye\nP.S. more", "Bye\nPPS more", "Bye\nP.P.S."],
        ),
    ],
    "detectable_content:number_placeholders": [
        (
            {"num_placeholders": 2},
            ["Dear [name], at [address].", "[a][b][c]", "[two words] [3]"],
            [
                "Dear [name],",
                "[] [ ]",
                "- [ ] milk\n- [ ] eggs",
                "[site](https://a.b) and [name]",
                "[one [name",
                "[[name]]",
            ],
        ),
    ],
    "detectable_format:number_bullet_lists": [
        (
            {"num_bullets": 2},
            [
                "* one\n* two",
                "Intro:\n- one\n- two\nEnd",
                "  * one\n\n  + two",
                "* one\n* * *\n* two",
                "* *a*\n* **b**",
            ],
            [
                "* one",
                "* one\n* two\n* three",
                "*one\n*two",
                "1. one\n2. two",
                "• one\n• two",
                "**one**\n**two**",
                "* one * two",
            ],
        ),
        ({"num_bullets": 1}, ["- a\n---\n"], ["* \n*", "-- a"]),
    ],
    "detectable_format:title": [
        (
            {},
            ["<<Ode>>\nO sea", "I call it <<poem of joy>>."],
            ["<Ode>", "<<>>", "<< >>", "<<Ode", "<<O\nde>>", "Title: Ode"],
        ),
    ],
    "detectable_format:constrained_response": [
        (
            {},
            ["My answer is yes.", "Let me think. It is.\nMy answer is maybe. Truly.", '"My answer is no."'],
            [
                "yes",
                "My answer is yes",
                "my answer is yes.",
                "My answer is yes. My answer is no.",
                "My answer is unclear.",
            ],
        ),
    ],
    "detectable_format:number_highlighted_sections": [
        (
            {"num_highlights": 2},
            ["*one* and *two*", "**one** and *two*", "***a***, **b c**, x", "* *one*\n* *two*"],
            ["*one*", "* one\n* two", "2*3*4*5", "** **", "*one\n*two", "**one *", "* one * two *"],
        ),
    ],
    "detectable_format:multiple_sections": [
        (
            {"section_spliter": "SECTION", "num_sections": 2},
            [
                "SECTION 1\nOne\nSECTION 2\nTwo",
                "**Section 1: a**\nx\n\n## Section 2\ny",
                "SECTION I\na\nSECTION II\nb",
                "SECTION 1\na\nSECTION 2\nb\nSECTION 3\nc",
            ],
            [
                "SECTION 1\nOne",
                "SECTION 1\nSECTION 2\n",
                "See section 1 and section 2.",
                "SECTIONS 1\na\nSECTIONS 2\nb",
                "1\na\n2\nb",
            ],
        ),
        ({"section_spliter": "Day", "num_sections": 1}, ["Day 1: fly"], ["Days 1", "Today 1 flew", "Day one"]),
    ],
    "detectable_format:json_format": [
        (
            {},
            ['{"a": 1}', ' [1, "x"]\n', '```json\n{"a": [1]}\n```', "```\n{}\n```", '```JSON\n{\n"a": null}\n```'],
            [
                "1",
                '"text"',
                "{'a': 1}",
                '{"a": 1,}',
                '{"a": 1} Done.',
                'Here:\n```json\n{"a": 1}\n```',
                "",
                '{"a": NaN}',
                "[" * 9999,
            ],
        ),
    ],
    "combination:repeat_prompt": [
        (
            {"prompt_to_repeat": "Write a poem, please."},
            ["Write a poem, please.\n\nO sea", "  Write a poem,\nplease. O sea"],
            [
                "O sea",
                "Write a poem, please.",
                "Sure! Write a poem, please. O sea",
                "Write a poem please. O sea",
                "write a poem, please. O sea",
            ],
        ),
    ],
    "combination:two_responses": [
        (
            {},
            ["One\n******\nTwo", "One ****** Two", "******\nOne\n******\nTwo\n******"],
            [
                "One",
                "One\n***\nTwo",
                "One\n******\nOne",
                "One\n******\none\n",
                "A\n******\nB\n******\nC",
                "A\n*******\nB",
                "A\n******\n",
            ],
        ),
    ],
    "change_case:english_capital": [
        (
            {},
            ["THE CAT SAT ON THE MAT.", "YES, 3 TIMES!", "HELLO"],
            ["THE CAT SAT ON THE mAT.", "The cat", "123 !", "LE CHAT EST SUR LE TAPIS DEPUIS CE MATIN."],
        ),
    ],
    "change_case:english_lowercase": [
        (
            {},
            ["the cat sat on the mat.", "yes, 3 times!", "i am here"],
            ["The cat sat on the mat.", "I am here", "123 !", "le chat est sur le tapis depuis ce matin."],
        ),
    ],
    "change_case:capital_word_frequency": [
        (
            {"capital_relation": "at least", "capital_frequency": 2},
            ["NASA and ESA", "I AM here", "A-B C3PO"],
            ["NASA and Esa", "nasa", "iPHONE USa"],
        ),
        ({"capital_relation": "less than", "capital_frequency": 1}, ["All quiet, 42"], ["I see", "the USA"]),
    ],
    "startend:end_checker": [
        (
            {"end_phrase": "Peace!"},
            ["Make love. Peace!", "make PEACE!\n", '"So: Peace!"', "Peace!"],
            ["Peace! Bye.", "Peace", "Peace.", "Peace! P.S. x"],
        ),
        ({"end_phrase": "Hope you agree with me."}, ["So. Hope you\nagree with me."], ["So. Hope you agree."]),
    ],
    "startend:quotation": [
        (
            {},
            ['"Hello."', ' "He said "hi"." \n', "“Hello.”"],
            ["Hello", '"Hello', 'Hello"', "'Hello'", '""', '"', '"Hello" he said'],
        ),
    ],
    "punctuation:no_comma": [
        ({}, ["No such mark; none.", "1 000"], ["one, two", "1,000", "一，二", "واحد، اثنان"]),
    ],
}
