"""Graded answers to numeric questions, as ``verdicts`` has them: numbers in sentences, and words beside them."""

from __future__ import annotations

from tests.trainer.verdicts import Row

SENTENCES: list[Row] = [
    # sentences
    ("5", r"The answer is \pm 5.", 0), ("5", "The answer is 5 because 2 + 3 = 5.", 1),
    ("5", "The answer is 5. I am sure of 100%.", 1), ("100", "The answer is 5. I am sure of 100%.", 0),
    ("6", "The answer is 5, 6.", 0), ("5", r"It is \sqrt 5", 0), ("5", "4 = 5", 0), ("-13", "= -13", 1),
    ("5", "It takes 5 and a half hours", 0), ("5 mph", "It goes 5 miles per hour", 1), ("0.5", "It is ½", 1),
    ("5", "log 5", 0), ("5", "x = 3 + 5", 0), ("0.00005", r"It is 5 \times 10^{-5} m", 1),
    ("5", r"It is 5 \times 10^{-5} m", 0),
    # what denies it stands before or after it, in many languages
    ("18", "It cannot be 18", 0), ("18", "It is not exactly 18.", 0), ("18", "It isn't 18.", 0),
    ("18", "It is not 20, so it is 18.", 1), ("18", "Die Antwort ist 18.", 1), ("-18", "Die Antwort ist -18.", 1),
    ("18", "Die Antwort ist nicht 18.", 0), ("18", "Es sind weniger als 18.", 0), ("18", "La réponse est 18.", 1),
    ("18", "La réponse n'est pas 18.", 0), ("18", "La respuesta es 18 manzanas.", 1), ("18", "A resposta é 18.", 1),
    ("18", "A resposta não é 18.", 0), ("18", "Ответ: 18.", 1), ("18", "Ответ не 18", 0), ("18", "Больше 18", 0),
    ("18", "答案是18。", 1), ("-18", "答案是-18。", 1), ("18", "答案不是18。", 0), ("18", "超过18", 0),
    ("18", "第18", 0), ("18", "答えは18です。", 1), ("18", "答えは18ではありません。", 0), ("18", "답은 18입니다.", 1),
    ("18", "答案：１８", 1), ("18", "#### １８", 1), ("18", "<answer>#### 18</answer>", 1),
    ("18", "<answer>20</answer> 18", 0),
    # the sign of a dash, several numbers behind brackets and signs
    ("3", "x = – 3", 0), ("3", "The temperature is – 3.", 0), ("8", "it is 7 – 8", 0), ("8", "7 ± 8", 0),
    ("8", "7 ∙ 8", 0), ("8", "The ratio is 7 : 8", 0), ("8", "The point is (7, 8).", 0),
    ("8", "The interval is [7, 8]", 0), ("8", "it is gcd(7, 8)", 0),
    # scripts of other words
    ("15", "У неё осталось 15 яблок.", 1), ("15", "Значит, всего он потратил 15 долларов.", 1),
    ("15", "Итак, ей нужно 15 минут.", 1), ("15", "คำตอบคือ 15", 1), ("15", "Συνολικά χρειάζονται 15 ημέρες.", 1),
    ("15", "الجواب النهائي هو 15.", 1),
    # headings
    ("15", "### Answer\n15", 1), ("15", "### Final Answer\n\n15", 1), ("15", "## Final Answer:\n**15**", 1),
    ("15", "**Final Answer**\n15", 1), ("15", "### Answer: 15", 1), ("15", "## The answer is 15", 1),
    ("16", "## The answer is 15", 0),
    # what is worked out
    ("42", "The answer is 6 * 7 = 42.", 1), ("42", "Answer: 6 x 7 = 42", 1), ("42", r"\boxed{6 \times 7 = 42}", 1),
    ("42", "<answer>6*7=42</answer>", 1), ("42", "#### 6*7=42", 1), ("42", r"\boxed{6 \times 8 = 42}", 0),
    ("42", "So it is 6 * 7 = 42.", 1), ("42", "#### 40+2=42", 1), ("2", r"\boxed{4 = 5}", 0),
    ("42", r"\boxed{4 = 42}", 0),
    # hedges and compounds
    ("8", "The roots are x = 7 or x = 8.", 0), ("8", "7 or perhaps 8", 0), ("8", "7 out of 8", 0),
    ("8", "7 divided by 8", 0), ("30", "It takes 2 hours 30 minutes.", 0), ("3", "5 feet 3 inches", 0),
    ("19", "Die Antwort ist 18 oder 19.", 0), ("19", "La respuesta es 18 o 19.", 0),
    # factors, halves and bounds of other languages
    ("18", "18十", 0), ("18", "18兆", 0), ("18", "18조", 0), ("18", "18백", 0), ("18", "18个半", 0),
    ("18", "18以上", 0), ("18", "18以下", 0), ("18", "18 Hundert", 0), ("18", "18 viertel", 0), ("18", "18 Zehntel", 0),
    ("18", "18 und ein halb", 0), ("18", "18 et demi", 0), ("18", "18 decenas", 0), ("18", "18 сотен", 0),
    ("18", "18 billones", 0),
    # what follows a number and leaves it as it is
    ("42", "It takes 42 days to finish.", 1), ("42", "He needs $42 to buy it.", 1),
    ("42", "There are 42 ways to choose.", 1), ("42", "He paid $42 for three books.", 1),
    ("42", "<answer>42 days to finish</answer>", 1), ("42", "42 to 50", 0), ("42", "42 to fifty", 0),
]
