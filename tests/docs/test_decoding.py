"""The examples of docs/decoding.md run, one after the other."""


def test_the_examples_run(document, tiny_model, capsys):
    _, blocks = document("docs/decoding.md")
    generate, trees, pairs = (body for language, _, body in blocks if language == "python")
    names = {}
    exec(generate.replace("path/or/hub-name", str(tiny_model)), names)
    assert int(capsys.readouterr().out.strip().splitlines()[-1]) > 0
    exec(trees, names)
    one = names["one"]
    assert len(one.tokens) == 16 <= 1 + sum(one.accepted) + len(one.accepted)
    alone = names["Generator"](names["loaded"].model, names["loaded"].variables)
    assert (
        one.tokens == alone.generate([names["loaded"].tokenizer.encode("def f(x):")], 16)[0].tokens
    )
    exec(pairs.replace("path/or/smaller-name", str(tiny_model)), names)
    assert names["drafted"].tokens == names["switched"].tokens == one.tokens
    assert [int(tick.tokens[0]) for tick in names["ticks"]] == one.tokens
