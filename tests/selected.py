"""Of tests with many cases of one law, those that `make test` runs; `make test-all` runs every case.

By file and test: the ids of the cases to run, none where the whole test is left to `make test-all`.
"""

SELECTED: dict[str, tuple[str, ...]] = {
    "test_agreement.py::test_a_number_given_twice_ends_all": (),
    "test_agreement.py::test_a_process_alone_ends_at_the_deadline": ("0",),
    "test_all_kinds.py::test_a_few_equal_the_unsharded_step": ("81",),
    "test_anytime.py::test_an_interrupt_ends_the_search_at_once": (
        "0.5",
        "3.0",
    ),
    "test_anytime.py::test_small_contest_graphs_are_proven": ("example",),
    "test_attention_kernels.py::test_rows_of_a_causal_attention_on_devices_of_their_own": (
        "in order",
    ),
    "test_audit.py::test_predicted_bytes_and_memory_are_near_the_compiled_ones": ("gpt-tiny",),
    "test_batch_stats.py::test_each_microbatch_is_normed_by_itself": ("masked",),
    "test_capture.py::test_replay_gives_the_bits_of_the_step": (
        "gpt-tiny-options0",
        "llama-tiny-scan-options3",
    ),
    "test_composites.py::test_fused_steps_equal_plain_jax_on_eight_devices": (
        "grouped, causal-2x4",
        "bias, dropout-2x4",
        "layers in a loop-8",
        "windows, in loops-8",
    ),
    "test_composites.py::test_fused_steps_in_stages": (
        "{'microbatches': 4, 'program': 'stages', 'schedule': 'zb-h1'}",
    ),
    "test_context_parallel.py::test_rows_cut_over_devices_equal_one_device": (
        "biased-2x4-even",
        "documents-8-even",
        "windowed-8-rows",
    ),
    "test_context_parallel.py::test_rows_dealt_out_evenly_in_layers": ("{'recompute': 'full'}",),
    "test_conventions.py::test_nnx_objects_are_updated_in_place_as_by_nnx_jit": ("jit",),
    "test_crossings.py::test_a_model_of_torch_trains_on_xla_as_in_torch": (
        "gpt, eight devices",
        "convnet",
    ),
    "test_crossings.py::test_an_operation_of_torch_does_the_same_on_xla": (
        "isfinite",
        "log2",
        "grouped products",
        "largest",
        "running",
    ),
    "test_equality.py::test_recompute_and_microbatches_change_no_result": (
        "gpt-tiny-scan-selective",
    ),
    "test_examples.py::test_an_example_trains_as_its_library_does": (
        "flax_linen",
        "haiku_transform",
        "equinox_filter_jit",
        "plain_jax",
    ),
    "test_fixed.py::test_the_step_equals_the_unsharded_one": (
        "llama-tiny-parallelism10-options10",
    ),
    "test_frontier.py::test_a_plan_made_anew_equals_the_unsharded_step": (),
    "test_frontier.py::test_as_fast_as_a_search_of_the_same_hosts": (),
    "test_frontier.py::test_pins_hold_and_devices_of_a_host_that_are_spare_are_told": (),
    "test_frontier.py::test_the_clock_has_no_part_in_a_plan_made_anew": (),
    "test_indexing.py::test_ids_find_their_places_however_an_op_is_cut": ("scatter-add-fill",),
    "test_islands.py::test_every_combination_looked_at_is_no_better": (),
    "test_islands.py::test_requests_that_unlike_devices_cannot_meet": (),
    "test_key_spans.py::test_leaving_keys_out_changes_nothing": (
        "documents of 32",
        "dropout",
    ),
    "test_local_prices.py::test_tables_and_programs_cost_the_same": (
        "mixtral-tiny-2x2x2-4-squeezed",
    ),
    "test_localize.py::test_a_pipeline_has_a_program_for_each_pass": ("schedule1",),
    "test_localize.py::test_programs_of_plans_keep_every_law": ("mixtral-tiny-mesh3-1-fused",),
    "test_losses.py::test_fused_steps_equal_plain_jax_on_eight_devices": (
        "optax, integers-2x2x2-vvb",
        "log_softmax, take_along_axis-4x2-vt",
        "tied, bias-8-b",
    ),
    "test_losses.py::test_fused_steps_with_microbatches_recomputation_and_stages": (
        "{'recompute': 'selective', 'microbatches': 4}",
        "{'pp': 2, 'mesh': '4', 'microbatches': 2, 'program': 'single'}",
        "{'pp': 2, 'mesh': '4', 'microbatches': 4, 'program': 'stages', 'schedule': 'zb-h1'}",
    ),
    "test_memory.py::test_a_folded_graph_has_the_peak_of_the_whole_one": (
        "tpu-llama-tiny-none-1",
        "cuda-llama-tiny-selective-4",
    ),
    "test_memory.py::test_the_backward_pass_goes_on_from_what_holds_a_copy_back": (
        "gpt-tiny-selective",
        "gpt-tiny-scan-full",
        "wrn-tiny-elementwise",
    ),
    "test_mixtures.py::test_experts_beside_data_parallelism_equal_one_device": (),
    "test_models.py::test_experts_looked_up_agree_with_one_hot_products": ("some dropped",),
    "test_models.py::test_parameters_are_as_many_as_published": (
        "gpt2",
        "gpt2-xl",
        "gpt3-1.3b",
        "gpt3-175b",
        "llama3-8b",
        "mixtral-8x7b",
        "deepseek-v2",
        "deepseek-v3",
        "vit-b16",
        "wrn-50-2",
    ),
    "test_models.py::test_scanned_and_unrolled_layers_train_alike": ("gpt-tiny",),
    "test_models.py::test_tiny_models_learn": (
        "llama-tiny",
        "dlrm-tiny",
        "wrn-tiny",
    ),
    "test_overlap.py::test_the_simulator_and_the_windows_agree_on_fsdp": (
        "60GB/s-0.03-1",
        "20GB/s-0.02-4",
    ),
    "test_pipeline_bounds.py::test_no_cut_of_any_layouts_is_faster_than_the_bounds": (
        "9-2",
        "16-2",
    ),
    "test_pipeline_bounds.py::test_no_cut_that_fits_is_faster_than_the_bound_by_cases": (
        "18-4-all",
    ),
    "test_pipeline_bounds.py::test_what_does_not_fit_says_nothing_of_more_microbatches": (),
    "test_pipeline_buffers.py::test_arrays_of_forward_passes_alive_at_once_are_those_in_flight": (),
    "test_pipeline_matrix.py::test_a_few_equal_one_device": ("gpt-tiny-zb-h1-fsdp",),
    "test_pipeline_matrix.py::test_planned_parts_equal_one_device": (),
    "test_pipeline_view.py::test_recorded_passes_keep_the_order_of_ranks_and_of_data": ("1f1b",),
    "test_pipeline_xla.py::test_a_rank_holds_as_many_microbatches_as_its_schedule_says": (
        "searched",
    ),
    "test_pipeline_xla.py::test_every_schedule_makes_the_same_gradients": ("zero bubble",),
    "test_pipelined_overlap.py::test_no_cut_of_any_layouts_is_faster_than_the_bounds": (
        "all-mesh1-2-2",
        "parameters,gradients-mesh2-1-2",
    ),
    "test_pipelined_overlap.py::test_plans_with_and_without_stages_are_compared_under_one_model": (),
    "test_pipelined_overlap.py::test_windows_and_an_event_simulator_agree": (
        "1f1b-all",
        "zb-h1-tensor",
    ),
    "test_pipelines.py::test_a_pipeline_with_fewer_pins_that_a_refusal_names_fits": (),
    "test_pipelines.py::test_a_refusal_for_want_of_memory_says_what_is_needed_and_what_may_fit": (),
    "test_pipelines.py::test_a_reordered_pipeline_that_the_host_holds_up_is_not_taken_for_another": (
        "4.0-False-1",
    ),
    "test_pipelines.py::test_a_search_for_a_better_order_that_finds_no_room_ends_no_search_that_has_a_plan": (
        "1",
    ),
    "test_pipelines.py::test_all_units_together_cost_what_the_step_costs": (
        "gpt3-1.3b-elementwise",
        "gpt3-1.3b-full",
    ),
    "test_pipelines.py::test_any_number_of_stages_per_rank_runs": ("2-3-6",),
    "test_pipelines.py::test_memory_that_a_refusal_names_is_enough": (),
    "test_pipelines.py::test_no_number_of_stages_per_rank_is_faster_than_the_one_that_is_chosen": (),
    "test_pipelines.py::test_where_orders_of_passes_decide_they_are_looked_for_beside_plans_without_a_pipeline": (),
    "test_plan_checks.py::test_decisions_that_do_not_fit_the_step_are_refused": (
        "slots-<lambda>-dims",
        "strategies-<lambda>-has no strategy 99",
    ),
    "test_planner.py::test_finer_meshes_are_never_worse": (),
    "test_planner.py::test_over_hosts_states_are_replicated_until_memory_says_otherwise": (),
    "test_planner.py::test_the_search_matches_solving_every_combination": ("450000.0",),
    "test_price.py::test_all_stages_together_hold_the_models_own_state": (
        "tp2-pp2-dp2-cp1-zero1-gpt",
        "tp1-pp2-dp2-cp1-zero3-mixtral",
        "tp1-pp1-dp1-cp2-zero1-llama",
    ),
    "test_processes.py::test_a_stack_of_layers_lies_on_the_processes_of_its_stages": (),
    "test_public_styles.py::test_a_module_and_a_flag_as_static_arguments": (),
    "test_random_programs.py::test_pipelines_equal_plain_jax": ("0",),
    "test_random_programs.py::test_steps_equal_plain_jax": (
        "1",
        "3",
        "5",
    ),
    "test_recurrent.py::test_random_plans_of_a_recurrent_network_equal_one_device": (),
    "test_recurrent.py::test_weights_of_a_recurrent_network_are_reduced_once": ("gru",),
    "test_ring.py::test_a_ring_costs_the_same_as_a_plan_and_as_a_job": (
        "parameters,gradients,tensor",
    ),
    "test_ring.py::test_a_ring_equals_one_device": ("documents-8-ring",),
    "test_ring.py::test_rings_in_a_loop_of_layers_computed_again": (),
    "test_saved.py::test_it_costs_what_one_program_costs": (
        "gpt-tiny",
        "llama-tiny",
        "mixtral-tiny",
    ),
    "test_shards.py::test_models_with_wide_heads_train": ("llama",),
    "test_single.py::test_an_audit_finds_what_was_planned_between_stages_and_sees_one_permute_too_few": (
        "4-mesh1",
    ),
    "test_single.py::test_causes_of_memory_add_up_to_the_peak": (
        "single",
        "stages",
        "flat",
    ),
    "test_single.py::test_recomputing_changes_no_gradient": (),
    "test_single.py::test_state_lies_as_with_programs_of_stages_and_either_takes_the_other_on": (),
    "test_stacked.py::test_three_steps_give_what_plain_jax_gives": (
        "single",
        "1f1b",
    ),
    "test_text.py::test_captured_graphs_survive_text_and_json": (
        "gpt-tiny",
        "mixtral-tiny",
        "dlrm-tiny",
        "gpt-tiny-scan",
    ),
    "test_torch_capture.py::test_a_captured_step_is_planned": (
        "mixture",
        "convnet",
    ),
    "test_torch_capture.py::test_a_graph_takes_the_step_that_torch_takes": (
        "gpt-adamw",
        "mixture-sgd",
        "convnet-sgd",
    ),
    "test_torch_capture.py::test_attention_and_losses_are_found": ("llama",),
    "test_torch_capture.py::test_products_keep_batch_sequence_and_heads_apart": ("llama",),
    "test_torch_capture.py::test_repeated_layers_fold": ("Llama",),
    "test_torch_local.py::test_a_step_of_jax_gives_the_same_on_torch": (
        "deepseek-tiny",
        "wrn-tiny",
    ),
    "test_torch_local.py::test_planned_steps_give_what_one_device_gives": (
        "gpt-tiny-2x2x2-True",
        "mixtral-tiny-squeezed-True",
    ),
    "test_torch_local.py::test_rows_of_attention_cut_over_ranks_equal_one_device": (
        "fused-causal-2x4-even",
        "fused-masked out-4-ring",
        "ring-documents-8-ring",
    ),
    "test_torch_pipelines.py::test_other_models_and_meshes_give_what_one_device_gives": (
        "mixtral",
    ),
    "test_torch_pipelines.py::test_stages_of_unlike_meshes_give_what_one_device_gives": (
        "meshes1",
    ),
    "test_torch_pipelines.py::test_two_stages_of_two_ranks_give_what_one_device_gives": (
        "1f1b",
        "zb-h1",
    ),
    "test_torch_ranks.py::test_three_steps_give_what_one_device_gives": ("words1",),
    "test_truth.py::test_a_layout_costs_the_same_as_a_plan_and_as_a_job": (
        "gpt3-1.3b-a100x8-16-2048-layout4-full-1",
    ),
    "test_truth.py::test_a_layout_costs_the_same_with_a_fused_loss": (),
    "test_truth.py::test_no_given_layout_is_faster_than_the_bound_of_its_mesh": (
        "gpt2-sizes2-2-none-all",
    ),
    "test_unstack.py::test_a_scanned_model_folds_as_small_as_an_unrolled_one": (
        "False-llama-tiny",
        "True-gpt-tiny",
    ),
    "test_unstack.py::test_models_of_the_zoo_train_alike": ("llama-tiny-scan-sgd-False",),
    "test_verify.py::test_rounding_that_adam_magnifies_is_no_alarm": (),
    "test_view.py::test_notebooks_run_from_top_to_bottom": (),
}
