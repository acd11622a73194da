"""The section of this stage that `baton init` writes: with a critic where there is a reward model, else with groups."""

from training.starter import Given, Line, adapter_lines, checkpointing, data_lines, parent_line, rate_line, tokens


def section(given: Given) -> list[Line]:
    """The keys with their reasons; none if no answer can be rewarded."""
    learned = given.scorer is not None
    sources = given.of("prompts", "pairs") if learned else [one for one in given.data if one.reward is not None]
    if not sources:
        return []
    prompt = tokens(max(one.prompt for one in sources), given, share=0.5)
    answer = min(512, 512 if given.window is None else given.window - prompt)
    rewards = [f"{{model: {given.scorer}}}"] if learned else list(dict.fromkeys(str(one.reward) for one in sources))
    why = "the reward model of this recipe" if learned else "what can check an answer to these prompts"
    kl = Line("train.kl_coef", 0.05, "Tülu 3's PPO") if learned else Line("train.kl_coef", 0.01, "OLMo 2's GRPO")
    method = (
        [Line("advantage", "gae", "PPO with a critic, which starts from the reward model")]
        if learned
        else [Line("advantage", "group", "GRPO: answers to one prompt are compared, and no critic is needed")]
    )
    groups = (
        [Line("train.rollout_batch_size", 64, "answers of one iteration; more give a steadier gradient")]
        if learned
        else [
            Line("train.num_generations", 8, "answers to one prompt; DeepSeekMath has 64, TRL 8"),
            Line("train.rollout_batch_size", 64, "eight prompts an iteration; more give a steadier gradient"),
            Line("train.kl_in", "loss", "as GRPO was published"),
        ]
    )
    source = "3e-7: Tülu 3's PPO" if learned else "5e-7: OLMo 2's GRPO"
    rate = 3e-7 if learned else 5e-7
    if not given.adapted:
        rate, source = 1e-5, "above the 5e-7 of models of 7 B: smaller models take larger rates"
    critic = [rate_line(given, 10 * rate, "the critic has to keep ahead of the policy", "critic_learning_rate")]
    return [
        parent_line(given),
        *method,
        Line("reward", rewards, why),
        *data_lines(sources, "prompts; answers that they come with are not read"),
        Line("max_prompt_length", prompt, "the longest prompt looked at fits"),
        *adapter_lines(given, 8, "LoRA Without Regret: in reinforcement learning rank 1 learns as much"),
        Line("train.iterations", 200, "watch the held-out score and stop when it is flat"),
        *groups,
        Line("train.max_completion_length", answer, "the probe before the training says if too many are cut off"),
        rate_line(given, rate, source),
        *(critic if learned else []),
        kl,
        Line("train.per_device_train_batch_size", 4, "a limit; see `plan --fit`"),
        *checkpointing(given),
    ]
