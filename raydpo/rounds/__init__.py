"""On-policy rounds: sample answers of the policy, score them, pair them, train on the pairs, measure. The verb is
``raydpo rounds``."""
