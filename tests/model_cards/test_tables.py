from statistics import mean, stdev

import pytest

from m2mkd.model_cards.tables import comparison_sentence


class TestSentences:
    @staticmethod
    def sentence(difference, std, wins=3, n=3, ratio=1.0, values=()):
        split = {"mean_difference": difference, "std": std, "wins": wins, "n": n, "values": list(values)}
        comparison = {"arm": "m2mkd", "baseline": "e2e", "budget": "equal end-to-end epochs", "budget_ratio": ratio}
        return comparison_sentence({**comparison, "iid": split, "ood": None})

    def test_win_and_loss(self):
        start = "m2mkd − e2e at equal end-to-end epochs: IID "
        assert self.sentence(0.052, 0.008) == start + "+5.2 ± 0.8 points (3 of 3 seeds), m2mkd is better."
        assert self.sentence(-0.052, 0.008, 0) == start + "−5.2 ± 0.8 points (0 of 3 seeds), m2mkd is worse."

    @pytest.mark.parametrize(("mean", "std"), [(0.01, 0.02), (-0.01, 0.021), (0.02, 0.02), (0.0, 0.0)])
    def test_no_claim_within_one_deviation(self, mean, std):
        sentence = self.sentence(mean, std, wins=2)
        assert "no clear difference" in sentence
        assert "better" not in sentence and "worse" not in sentence

    @pytest.mark.parametrize("values", [(0.0, 0.005, 0.005), (-0.005, -0.005, 0.0001)])
    def test_no_claim_that_a_seed_contradicts(self, values):
        assert abs(mean(values)) > stdev(values)
        assert "no clear difference" in self.sentence(mean(values), stdev(values), 2, values=values)

    def test_claim_that_all_seeds_share(self):
        assert "is worse" in self.sentence(-0.01, 0.005, 0, values=(-0.015, -0.01, -0.005))
        assert "is better" in self.sentence(0.01, 0.005, 3, values=(0.015, 0.01, 0.005))

    def test_no_claim_from_one_seed(self):
        sentence = self.sentence(0.3, None, 1, 1)
        assert "+30.0 points (one seed), too few seeds to tell a difference." in sentence
        assert "better" not in sentence

    def test_unequal_budgets_are_named(self):
        assert "not equal" not in self.sentence(0.05, 0.01, ratio=1.04)
        assert "e2e had 1.5 times that of m2mkd" in self.sentence(0.05, 0.01, ratio=1.5)
        assert "e2e had 0 times that of m2mkd" in self.sentence(0.05, 0.01, ratio=0.0)
