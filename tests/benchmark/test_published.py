"""Quoted results of others: complete, said to be superseded where they are, and never taken for a comparison."""

from __future__ import annotations

from kne_easyedit.benchmark.published import published, quoted_results
from kne_easyedit.metrics import is_number, paper_metrics


class _Nothing:
    manifests = ()


def test_every_table_has_a_source_a_note_and_all_figures():
    tables = published()
    assert [table["source"].split(",")[0] for table in tables] == ["arXiv 2412.20637", "EasyEdit's README of July 2026"]
    for table in tables:
        assert table["note"].endswith(".")
        for of_model in table["models"].values():
            assert list(of_model) == ["counterfact", "zsre", "recent"]
            for of_data in of_model.values():
                for row in of_data.values():
                    assert len(row) == len(paper_metrics()) and all(map(is_number, row))


def test_the_note_about_the_papers_baselines_follows_from_the_figures():
    """FT-M of the corrected table leads the paper's KNE in success, portability and locality of all three sets."""
    paper, corrected = published()
    kne, ft_m = paper["models"]["llama2-7b-chat"], corrected["models"]["llama2-7b"]
    leads = [ft_m[data]["FT-M"][i] > kne[data]["KNE"][i] for data in kne for i in range(3)]
    assert len(leads) == 9 and all(leads)
    assert all(ft_m[data]["FT-M"][3] < kne[data]["KNE"][3] for data in kne)


def test_a_report_quotes_all_tables_with_their_notes():
    text = quoted_results(_Nothing())  # type: ignore[arg-type]
    for table in published():
        assert table["source"] in text and table["note"] in text
    assert "superseded" in text and "not to be compared" in text and "74.36" in text and "53.88" in text
