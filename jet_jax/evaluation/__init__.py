"""Measures of language models: what they recall, answer and predict, and how they differ.

    rows = retrieval.mqar(tokenizer, seed=0, num_rows=256, length=512, num_pairs=16)
    result = harness.evaluate(model, rows, batch_size=8, teacher=teacher)

A generator makes `Rows`, `token_scores` scores them with one forward pass under teacher forcing,
`item_sums` adds the scores up an answer, and `summarise` makes figures of the sums.
"""
