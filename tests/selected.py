"""Of tests with many cases of one law, those that `make test` runs; `make test-all` runs every case.

By file and test: the ids of the cases to run, none where the whole test is left to `make test-all`.
"""

SELECTED: dict[str, tuple[str, ...]] = {
    "test_equality.py::test_recompute_and_microbatches_change_no_result": (
        "gpt-tiny-scan-selective",
    ),
    "test_fixed.py::test_the_step_equals_the_unsharded_one": (
        "gpt-tiny-parallelism1-options1",
        "gpt-tiny-parallelism4-options4",
        "llama-tiny-parallelism7-options7",
        "llama-tiny-parallelism10-options10",
        "llama-tiny-parallelism12-options12",
    ),
    "test_frontier.py::test_as_fast_as_a_search_of_the_same_hosts": ("4",),
    "test_mixtures.py::test_experts_beside_data_parallelism_equal_one_device": ("dp4 ep2",),
    "test_pipeline_bounds.py::test_no_cut_that_fits_is_faster_than_the_bound_by_cases": (
        "16-4-overlap0",
        "18-4-all",
        "19-2-all",
    ),
    "test_pipeline_buffers.py::test_arrays_of_forward_passes_alive_at_once_are_those_in_flight": (
        "zero bubble",
    ),
    "test_pipeline_xla.py::test_a_rank_holds_as_many_microbatches_as_its_schedule_says": (
        "half split",
        "searched",
    ),
    "test_pipeline_xla.py::test_every_schedule_makes_the_same_gradients": (
        "zero bubble",
        "shuffled",
    ),
    "test_pipelines.py::test_a_search_for_a_better_order_that_finds_no_room_ends_no_search_that_has_a_plan": (
        "1",
    ),
    "test_pipelines.py::test_all_units_together_cost_what_the_step_costs": (
        "gpt3-1.3b-elementwise",
        "gpt3-1.3b-full",
        "vit-l16-full",
    ),
    "test_pipelines.py::test_any_number_of_stages_per_rank_runs": ("3-6",),
    "test_pipelines.py::test_memory_that_a_refusal_names_is_enough": ("pin0",),
    "test_pipelines.py::test_no_number_of_stages_per_rank_is_faster_than_the_one_that_is_chosen": (
        "4-3",
    ),
    "test_planner.py::test_finer_meshes_are_never_worse": (),
    "test_planner.py::test_over_hosts_states_are_replicated_until_memory_says_otherwise": (),
    "test_ring.py::test_a_ring_costs_the_same_as_a_plan_and_as_a_job": (
        "parameters,gradients,tensor",
    ),
    "test_unstack.py::test_models_of_the_zoo_train_alike": (
        "gpt-tiny-scan-adamw-True",
        "llama-tiny-scan-sgd-False",
    ),
}
