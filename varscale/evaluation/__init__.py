"""What is measured on a frozen encoder."""
