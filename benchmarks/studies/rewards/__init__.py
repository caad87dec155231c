"""What reading with a head costs against transformers, and rewards in the call against their parts."""
