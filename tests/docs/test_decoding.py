"""The example of docs/decoding.md runs."""


def test_the_example_runs(document, tiny_model, capsys):
    _, blocks = document("docs/decoding.md")
    (code,) = (body for language, _, body in blocks if language == "python")
    exec(code.replace("path/or/hub-name", str(tiny_model)), {})
    assert int(capsys.readouterr().out.strip().splitlines()[-1]) > 0
